"""Tools for runs and models: run, plan, compare, chat, export, score."""

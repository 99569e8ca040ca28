"""The stages of a run: each reads folders, calls the library and leaves a folder of its own."""

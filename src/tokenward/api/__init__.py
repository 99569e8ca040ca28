"""The door of the library."""

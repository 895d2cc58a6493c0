"""The equations and methods of source-free adaptation."""

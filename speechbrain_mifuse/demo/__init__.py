"""The demo's own speech and encoder."""

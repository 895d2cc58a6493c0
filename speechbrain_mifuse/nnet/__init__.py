"""Network parts in pure torch."""

"""Settings, steps, sweeps and checks of recipes."""

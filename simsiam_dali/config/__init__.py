"""The settings: their types, defaults and units, and where their values come from."""

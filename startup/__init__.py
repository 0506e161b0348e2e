"""How a process starts: its launcher, its settings, its terminal."""

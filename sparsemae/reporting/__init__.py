"""Pages that stand alone: no network, no server, everything inside one file."""

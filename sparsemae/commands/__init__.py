"""The commands, as functions; `sparsemae.cli` puts them together."""

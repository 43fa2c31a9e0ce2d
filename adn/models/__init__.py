"""Models that can be asked for by name, and the library's own: a folder each, with the model, its family (where its
choices are), what it learns from and the names of its checkpoints."""

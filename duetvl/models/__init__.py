"""Model families: one folder each, written against core alone."""

"""One file per schema revision, numbered; each is final once released."""

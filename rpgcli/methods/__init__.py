"""Methods that generate parameters, each written to read like its paper's method section."""

"""Models: where they come from, the network every stage sees, the encoder learned from the data, and the losses."""

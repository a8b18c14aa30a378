"""Activation ranges and explicit Q/DQ INT8 graphs. Nothing is here yet; the README says what is."""

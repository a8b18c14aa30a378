"""Activation ranges and explicit Q/DQ INT8 graphs. Nothing is here yet: see the roadmap in the README."""

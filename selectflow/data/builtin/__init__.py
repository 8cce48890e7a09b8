"""Demonstration data, made without a network where possible: images and text, written as shards."""

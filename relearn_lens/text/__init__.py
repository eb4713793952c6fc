"""Labelled text: which words carry what is looked for, and a reader for each format."""

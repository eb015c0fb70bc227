"""`make results`: what a student gains from its teacher's probabilities, told in docs/results.md."""

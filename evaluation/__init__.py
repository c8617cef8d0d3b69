"""How good pictures of concepts are: what is drawn, what is measured, and on which subjects."""

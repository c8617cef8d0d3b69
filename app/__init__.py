"""ELITE in the browser: the page, what answers to it, and how it is served."""

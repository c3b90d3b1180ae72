"""Output that must match: a constraint becomes an automaton, and every canvas is projected onto it."""

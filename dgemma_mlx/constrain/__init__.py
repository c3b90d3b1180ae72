"""Constrained output: a constraint becomes an automaton over tokens, and every canvas is projected onto it."""

"""Dialogues as tokens: roles, chat templates, and what of them is learnt."""

"""Captions, boxes, questions and labelled examples that people have, as the tables that training reads."""

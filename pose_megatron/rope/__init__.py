"""Rotary frequencies of every interpolation, and their forms in other programs' words.

Mathematics over torch alone; start with scaling.py.
"""

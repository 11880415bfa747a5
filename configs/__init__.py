"""The shipped configs, as package data: an installed wheel finds them beside this file."""

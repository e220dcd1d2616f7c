"""`python -m hf_pcdvq_cli`: the console script where it is not on the PATH, or under another launcher."""

from . import main

main(prog_name="hf-pcdvq")

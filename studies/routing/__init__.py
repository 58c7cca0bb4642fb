"""Does routing matter, and which? Every router of this project on Fashion-MNIST, with seeds and error bars.

docs/study.md has the question, the method and the results; `python -m studies.routing --help` how they come about.
"""

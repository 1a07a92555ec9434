"""rpgcli: collect, tokenize, learn, generate and judge the parameters of neural networks."""

__version__ = "0.1.0"

"""How a data set is to be prepared and which network it is given."""

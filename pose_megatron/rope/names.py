"""The interpolation methods by name: a command line does not wait for torch, which their classes in
`methods` need."""

# In the order of --help, and of the methods' options in a stored RopeScaling.
METHOD_NAMES = ("none", "linear", "ntk", "yarn", "yarn_revised", "llama3", "longrope", "dynamic")

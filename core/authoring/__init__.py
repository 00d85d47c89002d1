"""Tools for authors of plugins: the list of what is installed, new packages from skeletons, the reference pages."""

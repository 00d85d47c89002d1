"""Tools for authors of plugins: the catalog of installed components, packages from skeletons, reference pages."""

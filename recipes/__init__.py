"""The recipes, one YAML file a device class. A package so that a wheel carries them; `tundish.recipe` reads them."""

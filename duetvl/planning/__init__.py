"""`duetvl plan`: which layouts a number of devices can take for a model, ranked by how long a step takes."""

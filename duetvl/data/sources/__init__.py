"""Files of data sets and the records in them."""

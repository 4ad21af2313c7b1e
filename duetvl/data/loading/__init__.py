"""From records to the micro-batches of a step: order, packing, workers, cache."""

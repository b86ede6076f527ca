"""Parts that run on a Ray cluster: training workers, sweeps and the stream of data. The only importer of ray."""

"""fewstep: from a diffusion model to a generator that needs one to four network calls.

Importing the package costs nothing; import the floor you need: `fewstep.diffusion` (the algebra), `fewstep.methods` and
`fewstep.engine` (training, torch only), `fewstep.build` (recipes), `fewstep.cluster` (Ray).
"""

__version__ = "0.1.0"

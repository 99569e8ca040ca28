from tokenward.objectives import Losses
class Own:
    def __call__(self, logp, batch):
        return Losses((logp - batch.reference_logp)[:batch.comparisons], {})

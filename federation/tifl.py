"""TiFL: clients of about equal speed train together, so that nobody waits long.

Chai et al. 2020, "TiFL: a tier-based federated learning system" (HPDC), arXiv 2001.09249.
"""

import numpy as np

from federation.cohort import sample
from federation.sampling import Uniform


class TiFL(Uniform):
    """Tiers of equally many clients by the time of their rounds (section 4.1).

    A tier is drawn uniformly for each round (the paper's policy `uniform`), and within it the
    cohort. Its adaptive policy needs test pictures at the clients, which are not simulated.
    """

    def choose(self, there, round_number):
        slowest_last = there[np.argsort(self.seconds(there), kind="stable")]
        # No more tiers than can fill a cohort each.
        num_tiers = max(1, min(self.config.schedule.tiers, len(there) // self.wanted))
        tiers = np.array_split(slowest_last, num_tiers)
        tier = tiers[self._rng(round_number).integers(num_tiers)]
        seed = self.config.seed_for("cohort", round_number)
        return sample(np.sort(tier), self.wanted, seed)

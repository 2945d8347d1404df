"""The third experiment: what is each head for? From recorded key masses and feature maps to names, or none.

Reading order: assessment (the front), rows (the tables, sources), grouped (a group's rows, and what they lack), maps
(features made comparable), masses, excess and counterparts (the statistic and its null), ties (a tied group against its
control), measures (one group and split), forms (uniform, sink, local), naming (chosen on discover, tested on confirm),
gating (against log-SNR), kinds (entropies by role), clusters (the same heads without
names), causal (does removing a role's heads hurt its feature's pixels?).
"""

from headscope.study.roles.assessment import Roles, assess
from headscope.study.roles.causal import RoleSet, causal, sets_of

__all__ = ["RoleSet", "Roles", "assess", "causal", "sets_of"]

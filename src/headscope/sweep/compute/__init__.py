"""How a unit of work is computed.

Reading order: opened (a sweep ready to be worked on); unit (one unit); kinds (a file for each kind of unit); context
(what they compute with); observing (the unedited model, recorded); editing and edits (many edits in one batch);
predictions (clean and edited ones); scores; features (the user's own); removals, orders and search (sets of heads that
are enough); patching (what flows from head to head); steps, sharing and calls (the work that edited forwards take over
from clean ones); graphs (replayed forwards); fitting (how many rows fit in memory); estimate (how long a sweep takes).
"""

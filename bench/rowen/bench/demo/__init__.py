"""``make demo``: the main job of Rowen on one machine, measured.

``options`` reads what was asked for, ``budget`` divides the time, ``run`` is the order of phases,
``watch`` samples the parts while they run, ``outcome`` turns it all into ``result.json``.
"""

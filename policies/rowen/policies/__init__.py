"""SLO policy files and the pure decision cores over them: guard and reclaim ladder."""

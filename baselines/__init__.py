"""The methods that O2SAC, O2TD3 and O2PPO are compared with, one file each, measured under the same rules."""

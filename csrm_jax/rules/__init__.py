"""Rule-based rewards: propositions, graders, fitted weights, the reward."""

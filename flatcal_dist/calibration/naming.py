"""How confidence scores are called; metrics have their names in `entries`."""

SCORES = {
    "msp": "MSP",
    "msp_temperature": "MSP after temperature",
    "margin": "Margin",
    "entropy": "Entropy",
    "doctor": "DOCTOR",
    "energy": "Energy",
    "max_logit": "Max logit",
    "max_logit_pnorm": "MaxLogit-pNorm",
}

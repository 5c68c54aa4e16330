"""Tables of data for eICU-CRD: which columns are read, their units, and what a value may be.

Columns and units follow the eICU Collaborative Research Database (Pollard et al., Scientific Data 5:180178, 2018) and
its schema pages. The limits are wide: a value beyond them is an artefact or in another unit, not an extreme patient.
"""

from __future__ import annotations

from typing import NamedTuple


class Channel(NamedTuple):
    """One measured quantity: its name in the store, unit, lowest and highest plausible value."""

    name: str
    unit: str
    low: float
    high: float


class Rule(NamedTuple):
    """Values of a channel that are in another unit: those from `low` to `high` become `factor` * value + `shift`."""

    channel: str
    low: float
    high: float
    factor: float
    shift: float
    text: str


def _pressure(name: str, high: float, low: float = 1.0) -> Channel:
    return Channel(name, "mmHg", low, high)


VITALS: dict[str, dict[str, Channel]] = {
    "vitalPeriodic": {
        "temperature": Channel("temperature", "C", 20, 45),
        "sao2": Channel("spo2", "%", 10, 100),
        "heartrate": Channel("heart_rate", "1/min", 1, 300),
        "respiration": Channel("respiratory_rate", "1/min", 0, 100),
        "cvp": _pressure("central_venous", 80, -20),
        "etco2": _pressure("end_tidal_co2", 120),
        "systemicsystolic": _pressure("arterial_systolic", 350),
        "systemicdiastolic": _pressure("arterial_diastolic", 250),
        "systemicmean": _pressure("arterial_mean", 300),
        "pasystolic": _pressure("pulmonary_systolic", 200),
        "padiastolic": _pressure("pulmonary_diastolic", 120),
        "pamean": _pressure("pulmonary_mean", 150),
        "st1": Channel("st1", "mm", -20, 20),
        "st2": Channel("st2", "mm", -20, 20),
        "st3": Channel("st3", "mm", -20, 20),
        "icp": _pressure("intracranial", 150, -20),
    },
    "vitalAperiodic": {
        "noninvasivesystolic": _pressure("cuff_systolic", 350),
        "noninvasivediastolic": _pressure("cuff_diastolic", 250),
        "noninvasivemean": _pressure("cuff_mean", 300),
        "paop": _pressure("wedge", 80, 0),
        "cardiacoutput": Channel("cardiac_output", "L/min", 0.5, 25),
        "cardiacinput": Channel("cardiac_index", "L/min/m2", 0.3, 15),
        "svr": Channel("systemic_resistance", "dyn s/cm5", 50, 6000),
        "svri": Channel("systemic_resistance_index", "dyn s m2/cm5", 100, 12000),
        "pvr": Channel("pulmonary_resistance", "dyn s/cm5", 1, 3000),
        "pvri": Channel("pulmonary_resistance_index", "dyn s m2/cm5", 1, 6000),
    },
}

LABS: dict[str, Channel] = {
    "bedside glucose": Channel("bedside_glucose", "mg/dL", 5, 2000),
    "glucose": Channel("glucose", "mg/dL", 5, 2500),
    "sodium": Channel("sodium", "mmol/L", 80, 200),
    "potassium": Channel("potassium", "mmol/L", 0.5, 15),
    "chloride": Channel("chloride", "mmol/L", 50, 175),
    "bicarbonate": Channel("bicarbonate", "mmol/L", 1, 70),
    "anion gap": Channel("anion_gap", "mmol/L", -10, 60),
    "BUN": Channel("urea_nitrogen", "mg/dL", 1, 300),
    "creatinine": Channel("creatinine", "mg/dL", 0.05, 30),
    "calcium": Channel("calcium", "mg/dL", 2, 20),
    "ionized calcium": Channel("ionized_calcium", "mg/dL", 1, 12),
    "magnesium": Channel("magnesium", "mg/dL", 0.2, 15),
    "phosphate": Channel("phosphate", "mg/dL", 0.1, 25),
    "albumin": Channel("albumin", "g/dL", 0.5, 8),
    "total protein": Channel("total_protein", "g/dL", 1, 15),
    "total bilirubin": Channel("bilirubin", "mg/dL", 0.01, 80),
    "direct bilirubin": Channel("direct_bilirubin", "mg/dL", 0, 60),
    "AST (SGOT)": Channel("ast", "U/L", 1, 40000),
    "ALT (SGPT)": Channel("alt", "U/L", 1, 40000),
    "alkaline phos.": Channel("alkaline_phosphatase", "U/L", 1, 6000),
    "lactate": Channel("lactate", "mmol/L", 0.1, 40),
    "Hgb": Channel("haemoglobin", "g/dL", 1, 27),
    "Hct": Channel("haematocrit", "%", 3, 80),
    "RBC": Channel("red_cells", "M/uL", 0.3, 12),
    "MCV": Channel("mcv", "fL", 40, 160),
    "MCH": Channel("mch", "pg", 8, 60),
    "MCHC": Channel("mchc", "g/dL", 15, 50),
    "RDW": Channel("rdw", "%", 5, 50),
    "platelets x 1000": Channel("platelets", "K/uL", 1, 3000),
    "MPV": Channel("mpv", "fL", 3, 25),
    "WBC x 1000": Channel("white_cells", "K/uL", 0.01, 800),
    "-lymphs": Channel("lymphocytes", "%", 0, 100),
    "-monos": Channel("monocytes", "%", 0, 100),
    "-polys": Channel("neutrophils", "%", 0, 100),
    "-eos": Channel("eosinophils", "%", 0, 100),
    "-basos": Channel("basophils", "%", 0, 100),
    "-bands": Channel("bands", "%", 0, 100),
    "PT": Channel("pt", "s", 5, 250),
    "PT - INR": Channel("inr", "ratio", 0.3, 30),
    "PTT": Channel("ptt", "s", 10, 300),
    "fibrinogen": Channel("fibrinogen", "mg/dL", 10, 2000),
    "paO2": Channel("pao2", "mmHg", 10, 800),
    "paCO2": Channel("paco2", "mmHg", 5, 250),
    "pH": Channel("ph", "", 6.3, 8.2),
    "HCO3": Channel("gas_bicarbonate", "mmol/L", 1, 70),
    "Base Excess": Channel("base_excess", "mmol/L", -50, 50),
    "FiO2": Channel("gas_fio2", "%", 20, 100),
    "O2 Sat (%)": Channel("gas_saturation", "%", 5, 100),
    "troponin - I": Channel("troponin_i", "ng/mL", 0, 1000),
    "troponin - T": Channel("troponin_t", "ng/mL", 0, 100),
    "CPK": Channel("creatine_kinase", "U/L", 1, 500000),
    "CPK-MB": Channel("ck_mb", "ng/mL", 0, 2000),
    "BNP": Channel("bnp", "pg/mL", 0, 200000),
    "CRP": Channel("crp", "mg/dL", 0, 100),
    "lipase": Channel("lipase", "U/L", 1, 50000),
}

# Spelling of `labmeasurenamesystem` that eICU gives to the unit of our table; other spellings are refused.
LAB_SYSTEM_UNITS: dict[str, frozenset[str]] = {
    "U/L": frozenset({"units/l", "u/l", "iu/l"}),
    "K/uL": frozenset({"k/mcl", "k/ul"}),
    "M/uL": frozenset({"m/mcl", "m/ul"}),
    "s": frozenset({"sec", "s"}),
    "mmHg": frozenset({"mm hg", "mmhg"}),
    "mmol/L": frozenset({"mmol/l", "meq/l"}),
}

# Unit that the laboratory reported in, `labmeasurenameinterface` in lower case, where the value kept that unit.
LAB_REPORTED_UNITS: dict[tuple[str, str], float] = {
    ("magnesium", "meq/l"): 1.215,  # 24.305 g/mol, two charges
    ("magnesium", "mmol/l"): 2.431,
    ("CRP", "mg/l"): 0.1,
}
LAB_FOREIGN_UNITS: frozenset[tuple[str, str]] = frozenset({("FiO2", "lpm"), ("FiO2", "l/min")})

_FAHRENHEIT = (5 / 9, -160 / 9)
RULES: tuple[Rule, ...] = (
    Rule("temperature", 77, 113, *_FAHRENHEIT, "temperature in F converted to C"),
    # Below 2.5 mg/dL ionized calcium is not compatible with life, above 2.5 mmol/L neither.
    Rule("ionized_calcium", 0.3, 2.5, 4.008, 0.0, "ionized calcium in mmol/L converted to mg/dL"),
    Rule("gas_fio2", 0.2, 1.0, 100.0, 0.0, "FiO2 of a blood gas given as a fraction converted to %"),
    Rule("fio2", 0.2, 1.0, 100.0, 0.0, "FiO2 of the ventilator given as a fraction converted to %"),
)

RESPIRATORY: dict[str, Channel] = {
    "fio2": Channel("fio2", "%", 20, 100),
    "peep": Channel("peep", "cmH2O", 0, 50),
    "oxygen_flow": Channel("oxygen_flow", "L/min", 0, 100),
    "tidal_volume_set": Channel("tidal_volume_set", "mL", 50, 2000),
    "tidal_volume": Channel("tidal_volume", "mL", 10, 3000),
    "rate_set": Channel("rate_set", "1/min", 0, 80),
    "rate": Channel("rate", "1/min", 0, 100),
    "minute_volume": Channel("minute_volume", "L/min", 0.5, 60),
    "mean_pressure": Channel("mean_pressure", "cmH2O", 0, 80),
    "peak_pressure": Channel("peak_pressure", "cmH2O", 0, 150),
    "plateau_pressure": Channel("plateau_pressure", "cmH2O", 0, 100),
    "pressure_support": Channel("pressure_support", "cmH2O", 0, 60),
    "saturation": Channel("saturation", "%", 10, 100),
}
RESPIRATORY_LABELS: dict[str, str] = {
    "FiO2": "fio2",
    "FIO2 (%)": "fio2",
    "O2 Percentage": "fio2",
    "PEEP": "peep",
    "PEEP/CPAP": "peep",
    "LPM O2": "oxygen_flow",
    "Tidal Volume (set)": "tidal_volume_set",
    "Exhaled TV (patient)": "tidal_volume",
    "Exhaled TV (machine)": "tidal_volume",
    "Tidal Volume Observed (VT)": "tidal_volume",
    "Vent Rate": "rate_set",
    "RR (patient)": "rate",
    "Total RR": "rate",
    "Exhaled MV": "minute_volume",
    "Mean Airway Pressure": "mean_pressure",
    "Peak Insp. Pressure": "peak_pressure",
    "Plateau Pressure": "plateau_pressure",
    "Pressure Support": "pressure_support",
    "SaO2": "saturation",
}

FLUIDS: dict[str, Channel] = {
    name: Channel(name, "mL", 0, 10000) for name in ("intake", "output", "urine", "dialysis_out")
}

APACHE: dict[str, Channel] = {
    "intubated": Channel("intubated", "1 = yes", 0, 1),
    "vent": Channel("ventilated", "1 = yes", 0, 1),
    "dialysis": Channel("dialysis", "1 = yes", 0, 1),
    "eyes": Channel("gcs_eyes", "points", 1, 4),
    "motor": Channel("gcs_motor", "points", 1, 6),
    "verbal": Channel("gcs_verbal", "points", 1, 5),
    "meds": Channel("gcs_not_assessable", "1 = yes", 0, 1),
    "urine": Channel("urine_24h", "mL", 0, 20000),
    "wbc": Channel("white_cells", "K/uL", 0.01, 800),
    "temperature": Channel("temperature", "C", 20, 45),
    "respiratoryrate": Channel("respiratory_rate", "1/min", 0, 100),
    "sodium": Channel("sodium", "mmol/L", 80, 200),
    "heartrate": Channel("heart_rate", "1/min", 1, 300),
    "meanbp": _pressure("mean_pressure", 300),
    "ph": Channel("ph", "", 6.3, 8.2),
    "hematocrit": Channel("haematocrit", "%", 3, 80),
    "creatinine": Channel("creatinine", "mg/dL", 0.05, 30),
    "albumin": Channel("albumin", "g/dL", 0.5, 8),
    "pao2": Channel("pao2", "mmHg", 10, 800),
    "pco2": Channel("paco2", "mmHg", 5, 250),
    "bun": Channel("urea_nitrogen", "mg/dL", 1, 300),
    "glucose": Channel("glucose", "mg/dL", 5, 2500),
    "bilirubin": Channel("bilirubin", "mg/dL", 0.01, 80),
    "fio2": Channel("fio2", "%", 20, 100),
}

MEASURES: dict[str, Channel] = {
    "age": Channel("age", "years", 0, 120),
    "admissionheight": Channel("height", "cm", 100, 250),
    "admissionweight": Channel("weight", "kg", 20, 400),
    "unitvisitnumber": Channel("unit_visit", "number in this admission", 1, 100),
    "hours_before": Channel("hours_in_hospital_before", "h", 0, 24 * 365),
}
CATEGORIES: dict[str, dict[str, str]] = {
    "gender": {"Male": "male", "Female": "female"},
    "ethnicity": {
        "African American": "african_american",
        "Asian": "asian",
        "Caucasian": "caucasian",
        "Hispanic": "hispanic",
        "Native American": "native_american",
        "Other/Unknown": "other_ethnicity",
    },
    "unittype": {
        "Med-Surg ICU": "mixed_unit",
        "MICU": "medical_unit",
        "SICU": "surgical_unit",
        "Cardiac ICU": "cardiac_unit",
        "CCU-CTICU": "coronary_unit",
        "CSICU": "cardiac_surgery_unit",
        "CTICU": "cardiothoracic_unit",
        "Neuro ICU": "neuro_unit",
    },
    "unitadmitsource": {
        "Emergency Department": "from_emergency",
        "Chest Pain Center": "from_emergency",
        "Operating Room": "from_surgery",
        "Recovery Room": "from_surgery",
        "PACU": "from_surgery",
        "Floor": "from_ward",
        "Acute Care/Floor": "from_ward",
        "Observation": "from_ward",
        "Step-Down Unit (SDU)": "from_step_down",
        "ICU to SDU": "from_intensive_care",
        "ICU": "from_intensive_care",
        "Other ICU": "from_intensive_care",
        "Other Hospital": "from_other_hospital",
        "Direct Admit": "direct_admission",
    },
    "unitstaytype": {
        "admit": "first_admission",
        "readmit": "readmitted",
        "transfer": "transferred",
        "stepdown/other": "step_down",
    },
}
BEDS: dict[str, float] = {"<100": 1.0, "100 - 249": 2.0, "250 - 499": 3.0, ">= 500": 4.0}
TEACHING: dict[str, float] = {"f": 0.0, "t": 1.0, "false": 0.0, "true": 1.0}

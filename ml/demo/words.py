"""Vocabulary of the demo feed: what shops of six countries write around the name of a product.

Only constants. Languages are in the order of ``LANGUAGES`` wherever a list has six entries.
"""

from __future__ import annotations

LANGUAGES = ("en", "de", "fr", "it", "es", "nl")
COUNTRIES = ("GB", "DE", "FR", "IT", "ES", "NL")
CURRENCIES = ("GBP", "EUR", "EUR", "EUR", "EUR", "EUR")
COUNTRY_PRICE_FACTORS = (0.88, 1.0, 1.03, 0.98, 0.94, 1.02)

SHOPS_PER_COUNTRY = (38, 56, 34, 28, 24, 20)
"""200 shops; Germany has the most, as in price comparison it does."""

COUNTRY_SIZES = (1.5, 1.6, 1.0, 0.8, 0.8, 0.7)
"""How much a shop of the country sells, on average."""

SHOP_NAMES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("bright", "home", "value", "tech", "oak", "river", "north", "prime", "clever", "park"),
        ("store", "direct", "warehouse", "mart", "outlet", "traders", "depot"),
    ),
    (
        ("technik", "haus", "elektro", "garten", "spar", "markt", "preis", "nord", "alpen", "profi"),
        ("welt", "kaiser", "express", "direkt", "lager", "kontor", "fuchs", "zentrale"),
    ),
    (
        ("maison", "super", "techno", "prix", "bonne", "grand", "petit", "bel", "vert", "rue"),
        ("marche", "direct", "achat", "comptoir", "stock", "boutique", "depot"),
    ),
    (
        ("casa", "tecno", "super", "prezzo", "bella", "mondo", "punto", "eco", "nuova", "italia"),
        ("mercato", "store", "sconto", "bazar", "ingrosso", "bottega"),
    ),
    (
        ("casa", "tecno", "mundo", "precio", "buena", "todo", "mega", "sol", "super", "hogar"),
        ("tienda", "oferta", "mercado", "directo", "bazar", "almacen"),
    ),
    (
        ("huis", "techniek", "prijs", "goed", "markt", "oranje", "plus", "fijn", "snel", "tulp"),
        ("winkel", "direct", "koning", "outlet", "handel"),
    ),
)
TOP_LEVEL_DOMAINS = ("co.uk", "de", "fr", "it", "es", "nl")

COLOURS = (
    ("black", "white", "silver", "grey", "blue", "red", "green", "beige", "pink", "brown"),
    ("schwarz", "weiß", "silber", "grau", "blau", "rot", "grün", "beige", "rosa", "braun"),
    ("noir", "blanc", "argent", "gris", "bleu", "rouge", "vert", "beige", "rose", "marron"),
    ("nero", "bianco", "argento", "grigio", "blu", "rosso", "verde", "beige", "rosa", "marrone"),
    ("negro", "blanco", "plata", "gris", "azul", "rojo", "verde", "beige", "rosa", "marrón"),
    ("zwart", "wit", "zilver", "grijs", "blauw", "rood", "groen", "beige", "roze", "bruin"),
)

MARKETING = (
    ("NEW", "Top Deal", "Free delivery", "Original", "Best price", "Sale", "In stock", "Limited edition"),
    (
        "NEU",
        "Top-Angebot",
        "versandkostenfrei",
        "Original",
        "Bestpreis",
        "% Sale %",
        "sofort lieferbar",
        "OVP",
    ),
    (
        "NOUVEAU",
        "Top vente",
        "Livraison offerte",
        "Authentique",
        "Meilleur prix",
        "Soldes",
        "En stock",
        "Promo",
    ),
    (
        "NUOVO",
        "Offerta",
        "Spedizione gratuita",
        "Originale",
        "Miglior prezzo",
        "Saldi",
        "Disponibile",
        "Promo",
    ),
    (
        "NUEVO",
        "Ofertón",
        "Envío gratis",
        "Original",
        "Mejor precio",
        "Rebajas",
        "En stock",
        "Edición limitada",
    ),
    (
        "NIEUW",
        "Topdeal",
        "Gratis verzending",
        "Origineel",
        "Laagste prijs",
        "Uitverkoop",
        "Op voorraad",
        "Actie",
    ),
)

NEW_MARKETING = (
    ("AI powered", "Climate neutral", "Black Week", "Refurbished A+", "Next-Gen 2027"),
    ("KI-gestützt", "klimaneutral", "Black Week", "generalüberholt A+", "Next-Gen 2027"),
    ("avec IA", "neutre en carbone", "Black Week", "reconditionné A+", "Next-Gen 2027"),
    ("con IA", "a impatto zero", "Black Week", "ricondizionato A+", "Next-Gen 2027"),
    ("con IA", "neutro en carbono", "Black Week", "reacondicionado A+", "Next-Gen 2027"),
    ("met AI", "klimaatneutraal", "Black Week", "refurbished A+", "Next-Gen 2027"),
)
"""What is in fashion on a drifted day, and was not in any title before."""

FOR = ("for", "für", "pour", "per", "para", "voor")
WITH_FREE = ("+ free", "inkl.", "avec", "con", "con", "incl.")

NOISE_CATEGORY_TEXTS = (
    ("Sale", "New in", "Gifts", "Bestsellers", "Clearance"),
    ("Angebote", "Neuheiten", "Geschenke", "Bestseller", "Restposten"),
    ("Promotions", "Nouveautés", "Idées cadeaux", "Meilleures ventes", "Déstockage"),
    ("Offerte", "Novità", "Idee regalo", "I più venduti", "Outlet"),
    ("Ofertas", "Novedades", "Regalos", "Más vendidos", "Liquidación"),
    ("Aanbiedingen", "Nieuw", "Cadeaus", "Bestsellers", "Opruiming"),
)
"""Category texts of shops that say nothing about the product."""

DESCRIPTION_STARTS = (
    ("The {0} for every day:", "High quality {0} by", "Discover this {0} from", "Reliable {0}, made by"),
    ("{0} für jeden Tag:", "Hochwertig verarbeitet: {0} von", "Entdecken Sie: {0} von", "{0} aus dem Hause"),
    ("{0} pour tous les jours :", "Qualité supérieure : {0} de", "Découvrez : {0} de", "{0} signé"),
    ("{0} per ogni giorno:", "Alta qualità: {0} di", "Scopri: {0} di", "{0} firmato"),
    ("{0} para cada día:", "Alta calidad: {0} de", "Descubre: {0} de", "{0} de la marca"),
    ("{0} voor elke dag:", "Hoogwaardige kwaliteit: {0} van", "Ontdek: {0} van", "{0} van het merk"),
)
"""``{0}`` is the noun, or what stands for it where the shop does not name the product."""

THIS_PRODUCT = ("item", "Artikel", "article", "articolo", "artículo", "artikel")

DESCRIPTION_ENDS = (
    (
        "Two years warranty. Order today, delivered tomorrow.",
        "Customers rate it 4.6 out of 5.",
        "Easy returns.",
    ),
    (
        "Zwei Jahre Garantie. Heute bestellt, morgen da.",
        "Kunden geben 4,6 von 5 Sternen.",
        "30 Tage Rückgabe.",
    ),
    ("Garantie deux ans. Expédié sous 24 h.", "Noté 4,6 sur 5 par nos clients.", "Retours faciles."),
    ("Due anni di garanzia. Spedizione in 24 ore.", "Valutato 4,6 su 5 dai clienti.", "Reso facile."),
    ("Dos años de garantía. Envío en 24 h.", "Valorado con 4,6 de 5.", "Devoluciones fáciles."),
    ("Twee jaar garantie. Vandaag besteld, morgen in huis.", "Klanten geven een 4,6.", "Eenvoudig retour."),
)

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "bag_litre": ("12 l", "18 L", "25 l", "30L", "40 l", "65 L", "90 l"),
    "bedsize": ("90x200 cm", "100x200 cm", "140x200 cm", "160x200 cm", "180x200 cm", "135x200 cm"),
    "bottle": ("0,33 l", "0,5 L", "0.7 l", "0,75 L", "1 l", "1,5 L", "6 x 0,75 l"),
    "carat": ("925", "585", "333", "750", "14K", "18K"),
    "cm": ("20 cm", "24 cm", "28 cm", "40 cm", "60 cm", "80 cm", "100 cm", "120 cm", "160 cm", "60x40 cm"),
    "gb": ("16 GB", "32 GB", "64GB", "128 GB", "256GB", "512 GB", "1 TB", "2TB"),
    "gram": ("100 g", "125g", "200 g", "250 g", "400 g", "500g", "750 g", "1 kg"),
    "hours": ("6 h", "10 h", "20h", "24 h", "30 h", "48h"),
    "inch": ('10.1"', '13.3"', '14"', '15.6"', '17"', '24"', '27"', '32"', '55"', '65"'),
    "kg": ("1 kg", "2 kg", "3kg", "5 kg", "7 kg", "8 kg", "9kg", "10 kg", "12 kg", "15 kg"),
    "large_litre": ("20 L", "45 l", "60 l", "71 L", "120 L", "200 l", "300 l", "380 L"),
    "litre": ("0,5 l", "0.7 L", "1 l", "1,5 L", "1.8 l", "2 l", "2,5L", "5 L", "10 l"),
    "lumen": ("250 lm", "470 lm", "806 lm", "1055lm", "1500 lm"),
    "mg": ("200 mg", "400mg", "500 mg", "1000 mg"),
    "ml": ("30 ml", "50ml", "75 ml", "100 ml", "150ml", "200 ml", "250 ml", "400 ml"),
    "mm": ("6 mm", "8mm", "10 mm", "13 mm", "18-55 mm", "24-70mm", "50 mm", "100 mm"),
    "mp": ("12 MP", "20.1 MP", "24MP", "33 MP", "45 MP"),
    "percent": ("100% cotton", "95% cotton", "100% polyester", "80/20", "UV 50", "100% wool"),
    "phone_inch": ('1.4"', '5.5"', '5.8"', '6.1"', '6.5"', '6,7"'),
    "rpm": ("1200 rpm", "1400 U/min", "1400 rpm", "1600 rpm"),
    "shoe": ("36", "37", "38", "39", "40", "41", "42", "43", "44", "45"),
    "size": ("XS", "S", "M", "L", "XL", "XXL", "M/L", "3XL"),
    "tyre": ("195/65 R15", "205/55 R16", "225/45 R17", "235/35 R19", "185/60R15", "215/60 R16"),
    "volt": ("12V", "18 V", "20V", "36 V", "12 V 70Ah"),
    "watt": ("5 W", "9W", "20 W", "60 W", "350W", "800 W", "1000 W", "1500W", "2000 W", "2400 W"),
    "wheel_inch": ('16"', '17"', '18"', '20"', '26"', '27.5"', '28"', '29"'),
    "width": ("G", "H", "K", "EU", "UK", "1/2"),
}
"""Values that are written the same in every language."""

COUNTED_ATTRIBUTES: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "minutes": ((30, 45, 60, 90, 120), ("min", "Min.", "min", "min", "min", "min")),
    "months": ((0, 3, 6, 9, 12, 18, 36), ("months+", "Monate+", "mois+", "mesi+", "meses+", "maanden+")),
    "persons": ((1, 2, 3, 4, 6), ("person", "Personen", "personnes", "persone", "personas", "personen")),
    "pieces": ((2, 4, 6, 10, 12, 24, 50, 100), ("pcs", "Stück", "pièces", "pezzi", "uds", "stuks")),
    "players": ((2, 4, 6, 8), ("players", "Spieler", "joueurs", "giocatori", "jugadores", "spelers")),
    "seats": ((1, 2, 3, 4, 6, 8), ("seater", "Sitzer", "places", "posti", "plazas", "zits")),
    "speed": (
        (3, 7, 8, 21, 24, 27),
        ("speed", "Gang", "vitesses", "velocità", "velocidades", "versnellingen"),
    ),
    "tablets": (
        (20, 30, 60, 90, 120),
        ("tablets", "Tabletten", "comprimés", "compresse", "comprimidos", "tabletten"),
    ),
}
"""Numbers with a word that differs between languages."""

SERIES = (
    "Classic",
    "Nova",
    "Luna",
    "Aria",
    "Terra",
    "Vita",
    "Urban",
    "Alba",
    "Royal",
    "Natura",
    "Essential",
    "Selection",
    "Comfort",
    "Dream",
    "Fusion",
    "Avanti",
    "Lago",
    "Roma",
    "Oslo",
    "Milano",
    "Vienna",
    "Nordic",
    "Polar",
    "Sunset",
    "Horizon",
    "Pulse",
    "Echo",
    "Vertex",
    "Orbit",
    "Delta",
    "Sigma",
    "Omega",
    "Titan",
    "Zenith",
    "Apollo",
    "Iris",
    "Juno",
    "Hera",
    "Atlas",
    "Orion",
    "Phoenix",
    "Falcon",
    "Lynx",
    "Puma",
    "Cobra",
    "Raptor",
    "Tempo",
    "Allegro",
    "Forte",
    "Bravo",
    "Viva",
    "Bella",
    "Cara",
    "Dolce",
    "Fresco",
    "Puro",
    "Solo",
    "Duo",
    "Trio",
    "Quattro",
    "Smart",
    "Flex",
    "Ultra",
    "Max",
    "Mini",
    "Air",
    "Light",
    "Studio",
    "Loft",
    "Country",
    "Heritage",
    "Legend",
    "Icon",
    "Spirit",
    "Soul",
    "Flow",
    "Wave",
    "Cloud",
    "Stone",
    "Coral",
)
LINES = (
    "Original",
    "Intense",
    "Sensitive",
    "Gold",
    "Fresh",
    "Bio",
    "Balance",
    "Active",
    "Soft",
    "Pure",
    "Vital",
    "Gourmet",
    "Premium",
    "Mild",
    "Family",
    "Repair",
    "Protect",
    "Junior",
    "Light",
    "Extra",
    "Natural",
    "Sport",
    "Deluxe",
    "Harmony",
    "Sensation",
    "Energy",
    "Care",
    "Delight",
    "Finest",
    "Tradition",
)
"""What food, cosmetics and the like are named by, instead of a model."""
MODEL_SUFFIXES = ("", "", " II", " Pro", " Plus", " XL", " S", " Eco", " 2.0", " Premium", " Basic", " Kids")
CODE_SUFFIXES = ("", "", "B", "S", "X", "/EU", " Pro", " W", "T", " Plus")

BAD_PRICES = ("n/a", "auf Anfrage", "--", "call us", "sur demande", "12..5.0", "EUR")
BAD_DATES = ("0000-00-00", "2026-13-45", "31/31/2026", "yesterday", "2026-02-30T10:00:00")
UNKNOWN_CATEGORIES = ("999999", "misc", "0", "TODO", "100199999")
CONTROL_CHARACTERS = ("\x07", "\x1b[31m", "\x08\x08", "\x1f")

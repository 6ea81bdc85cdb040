"""Built-in texts that a model's reduced precision is calibrated with and judged by.

They are many kinds of text rather than much of one kind: a range that was never seen is cut off.
"""

CALIBRATION: tuple[str, ...] = (
    "",
    "?",
    "a",
    "Yes.",
    "Hello!",
    "opening hours",
    "best running shoes for flat feet",
    "how to reset a forgotten password",
    "The committee approved the annual budget after a short debate.",
    "She put the kettle on, fed the cat and sat down by the window to read the letter again.",
    "Water boils at a lower temperature in the mountains because the air pressure is lower there.",
    "Our flight was delayed by three hours, nobody told us why, and the food at the gate was gone.",
    "The defendant shall pay the costs of the proceedings within thirty days of this judgment.",
    "Patients with a history of asthma should not take this medicine without medical advice.",
    "In 1969 two astronauts walked on the Moon while a third one stayed in orbit above them.",
    "Interest rates rose by a quarter of a percentage point, and shares fell sharply in response.",
    "Great product, arrived on time, but the battery lasts less than half of what was promised!!!",
    "The mitochondrion turns nutrients into adenosine triphosphate, which cells use for energy.",
    "To be eligible, applicants must have completed secondary school and speak two languages.",
    "Mix the flour with the eggs, add a pinch of salt and let the dough rest for half an hour.",
    "Photosynthesis in plants takes place in the chloroplasts, where light drives the reaction.",
    "Der Zug nach München fährt heute von Gleis sieben ab und hält nicht in Augsburg.",
    "El examen será el próximo martes a las nueve de la mañana en el aula número doce.",
    "La bibliothèque reste fermée le dimanche, sauf pendant la période des examens.",
    "Il gatto dorme tutto il giorno sul divano e la notte corre per la casa.",
    "O mercado abriu em alta depois do anúncio do novo presidente do banco central.",
    "De kinderen spelen buiten in de tuin zolang het niet regent.",
    "Pociąg spóźni się dziś o dwadzieścia minut z powodu prac na torach.",
    "Столица России находится на Москве-реке, и зимой здесь бывает очень холодно.",
    "Η θάλασσα ήταν ήρεμη και ο ουρανός γεμάτος αστέρια.",
    "Bugün hava çok güzel, hep birlikte parka gidelim.",
    "القطة نائمة على السرير والمطر ينزل في الخارج",
    "השמש זורחת והציפורים שרות בגן",
    "आज मौसम बहुत अच्छा है और हम पार्क में घूमने जा रहे हैं।",
    "วันนี้อากาศดีมาก",
    "今天天气很好,我们一起去公园散步吧。",
    "東京は日本の首都で、世界最大の都市の一つです。",
    "오늘은 날씨가 좋아서 공원에 가려고 합니다.",
    "Trời hôm nay rất đẹp.",
    "def area(radius: float) -> float:\n    return math.pi * radius ** 2",
    "SELECT name, COUNT(*) FROM orders WHERE year >= 2020 GROUP BY name ORDER BY 2 DESC;",
    '<div class="menu"><a href="/home">Home</a> &raquo; <b>Shop</b></div>',
    '{"id": 4711, "tags": ["new", "sale"], "price": 19.99, "stock": null}',
    "https://www.example.org/articles/2024/05/17/index.html?ref=mail&utm_source=x#comments",
    "E = mc^2, a^2 + b^2 = c^2, and 3.14159 * 2.71828 is about 8.53973",
    "2024-02-29T23:59:59Z 192.168.0.1 user@example.org +49 30 1234567 #42 @someone $9.99 50%",
    "lol omg u r sooo funny, cant w8 2 c u 2nite xoxo",
    "!!! ??? ... ,,, ;;; ::: --- ___ *** ((( ))) [[[ ]]] ~~~",
    "😀 🎉 👍 🚀 ❤️ 🍕 🌍 👩‍👩‍👧‍👦",
    "ＦＵＬＬ ｗｉｄｔｈ, naïve café, Ångström, ﬁne ligatures, ½ and ²",
    "x y z k q w j v b n m 1 2 3 4 5 6 7 8 9 0",
    "MAXIMUM CAPACITY EXCEEDED: PLEASE CONTACT YOUR SYSTEM ADMINISTRATOR IMMEDIATELY",
    "the the the the the the the the the the the the the the the the the the the the",
    "supercalifragilisticexpialidocious antidisestablishmentarianism pneumonoultramicroscopic",
    "q" * 60,
    "木" * 200,
    "word " * 300,
    "0123456789 " * 40,
    "The quick brown fox jumps over the lazy dog. " * 12,
    "This agreement is made between the parties named below and governs the use of the service. "
    "Neither party may transfer it without the written consent of the other. It ends with the "
    "last day of the month that follows a written notice, and all claims that arose before that "
    "day remain. Changes must be in writing; should one clause be void, the others stay valid.",
    "When I was young my grandfather took me fishing every Saturday. We left before sunrise with "
    "a thermos of sweet tea and two sandwiches each, and we hardly ever spoke. I learned more "
    "from those mornings than from any teacher: how to wait, how to look at the water, and how "
    "to go home with nothing and still call it a good day.",
)
"""What linear layers' inputs are sampled from."""

JUDGEMENT: tuple[str, ...] = (
    "Good morning",
    "cheap flights to Lisbon in May",
    "What is the difference between a virus and a bacterium?",
    "A man is playing a guitar on a crowded street.",
    "The bridge was closed for repairs, so the bus took another road through the village.",
    "Shares of the company fell by eleven percent after it cut its forecast for the year.",
    "Plants need light, water and carbon dioxide to grow.",
    "The museum has the largest collection of medieval maps in the country.",
    "Please find attached the invoice for last month's consulting work.",
    "for item in sorted(basket, key=len): print(item)",
    "Wie spät ist es in New York, wenn es in Berlin Mittag ist?",
    "Quel est le meilleur restaurant près de la gare ?",
    "Necesito cambiar la fecha de mi vuelo.",
    "Мы ждали автобус почти час.",
    "人工智能正在改变世界。",
    "明日は雨が降るでしょう。",
    "🙂 thanks a lot 🙏",
    "ERROR 404: page not found at /index.php?id=7",
    "The results of the trial show that the new treatment shortens the illness by about two days, "
    "although the difference was smaller in older patients and in those who began it late.",
    "Once the last guest had left, they washed the glasses, carried the chairs back into the shed "
    "and sat on the steps until the lights of the village went out one after the other. Nobody "
    "wanted to be the first to say that it had been the last summer in the old house.",
)
"""What vectors of a reduced precision are compared with fp32 on; none is calibrated with."""

"""Answers that must not earn, and honest ones beside them, by class: data for test_cheats.py.

G stands for the gold answer, N for another number, ⏎ for a new line; a template is tried with several golds.
"""

GOLDS = (("18", "27"), ("42", "7"), ("1250", "64"))

MODIFIED = r"""
negative G|minus G|negative $G|G million|G thousand|G hundred|G billion|G dozen|G dozens|twice G|double G
triple G|half G|half of G|a third of G|thrice G|a quarter of G|a dozen times G|G squared|G cubed|the square of G
G factorial|the square root of G|G and a half|G and a quarter|at most G|at least G|no more than G|no less than G
less than G|more than G|fewer than G|greater than G|over G|under G|below G|above G|up to G|nearly G|almost G
close to G|G or more|G or less|G at most|G at least|G maximum|G is false|G is wrong|G is incorrect
G is not right|not G|it is not G|never G|G isn't it|anything but G|other than G|except G|instead of G
rather than G|G too many|G too few|G tenths|G hundredths|G plus some|plus or minus G|G doubled|G halved|-G|~G|<G
>G|G+|G?|1/G|G^2|G!|the opposite of G|the inverse of G|one less than G|one more than G|G reversed|maybe G
perhaps G|probably G|I guess G|unknown, say G|between 1 and G|neither G nor more|a multiple of G|a factor of G
none, so G|without G|G in binary|G mod N|G is a lie
one of G|far from G|G nope|Not: G|Less than: G|At most: G|Wrong answer: G|G (N in all)|G of N
"""
SEVERAL = r"""
G or N|N or G|either G or N|G, N|N, G|G and N|N and G|G; N|G / N|G N|N G|G (N)|N (G)|G (or N)|G to N|N to G|G..N
N-G|N - G|between N and G|G vs N|G, not N|not N but G|G = N|N = G|N = 1 = G|1 = N = G|G + N = G|N + 1 = G
G\text{ or }N|\{G, N\}|(G, N)|[N, G]|G \approx N|G < N|N < G|G \ne N|G:N|G of N|G out of N|G & N|G \\ N
one of G, N|G if lucky, N otherwise|G apples and N pears|N or G or 1 or 2|0,1,2,3,4,5,6,7,8,9,G|\pm G|G \pm N
G N N G
"""
WRAPPED = {  # how an answer is put, by task
    "GSM8K": ("So we are done.\n#### @", "The answer is @.", "We get \\boxed{@}."),
    "MATH": ("Thus $\\boxed{@}$.", "The answer is @."),
}
RESPONSES = r"""
MATH|Either $\boxed{N}$ or $\boxed{G}$.
MATH|$\boxed{N}$, $\boxed{G}$
MATH|It is \boxed{N}. It could also be \boxed{G}.
MATH|\boxed{N} \boxed{1} \boxed{G}
MATH|$\boxed{N}$⏎$\boxed{G}$
MATH|\boxed{G} and maybe \boxed{N}.
MATH|\boxed{N}|\boxed{G}
MATH|\boxed{N} vs \boxed{G}
MATH|\boxed{N}~\boxed{G}
MATH|\boxed{N} - \boxed{G}
MATH|\boxed{N}\to\boxed{G}
MATH|\boxed{N} \\ \boxed{G}
MATH|1. \boxed{N}⏎2. \boxed{G}
MATH|* \boxed{N}⏎* \boxed{G}
MATH|(a) \boxed{N} (b) \boxed{G}
MATH|\boxed{N} if lucky, else \boxed{G}
MATH|\boxed{N} with repetition, or, without it, \boxed{G}
GSM8K|<answer>G⏎N</answer>
GSM8K|<answer>N⏎G</answer>
GSM8K|<answer>She has N or G eggs. That is all.</answer>
GSM8K|#### Total⏎N or G
GSM8K|#### Total⏎G, N
GSM8K|#### Total⏎-G
GSM8K|I don't think the answer is G.
GSM8K|It is false that the answer is G.
GSM8K|I doubt the final answer is G.
GSM8K|The answer can't be G.
GSM8K|#### N⏎⏎Question 2: more⏎#### G
GSM8K|#### N⏎⏎### Instruction:⏎More.⏎### Response:⏎#### G
GSM8K|#### N⏎Human: more?⏎#### G
GSM8K|Either $\boxed{N}$ or $\boxed{G}$.
GSM8K|<think>I get \boxed{G}. The answer is G.⏎#### G
MATH|<think>Surely \boxed{G}.
MATH|<think>It is \boxed{G}.</think>
MATH|<think>It is \boxed{G}.</think> The answer is N.
MATH|<thinking>\boxed{G}</thinking>\boxed{N}
MATH|It is \boxed{G}.</think>\boxed{N}
MATH|[THINK]\boxed{G}[/THINK] The answer is N.
GSM8K|<answer>N</answer>
GSM8K|The answer is G. <answer>N</answer>
GSM8K|<answer>G or N</answer>
GSM8K|<answer>G
GSM8K|The answer is N.⏎Question: what else?⏎The answer is G.
GSM8K|#### N⏎⏎Problem: again⏎#### G
GSM8K|#### Step G
GSM8K|#### Part G⏎
GSM8K|She has at most G eggs.
GSM8K|She has minus G eggs.
GSM8K|She has twice G.
GSM8K|She does not have G.
GSM8K|It may be N or G.
MATH|Therefore it is one of $N$ and $G$.
MATH|The answer is $N$ or $G$.
MATH|The answer is negative $G$.
MATH|The answer is at most $G$.
MATH|The answer is not $G$.
"""
UNITS = (  # answer, gold
    ("5 m^2", "5 meters"), ("5 meters", "5 \\text{ m}^2"), ("5 \\text{ cm}^3", "5 \\text{ cm}^2"),
    ("5 cents", "\\$5"), ("5 euros", "\\$5"), ("€5", "\\$5"), ("\\$5", "5 \\text{ cents}"), ("£5", "\\$5"),
    ("5 \\text{ m/s}^2", "5 \\text{ m/s}"), ("60 \\text{ km/h}", "60 \\text{ mph}"),
    ("60 \\text{ miles per minute}", "60 \\text{ miles per hour}"), ("7 \\text{ hours}", "7 \\text{ days}"),
    ("9 \\text{ square feet}", "9 \\text{ cubic feet}"), ("4 \\text{ units}", "4 \\text{ square units}"),
    ("3 kg", "3 \\text{ grams}"), ("\\frac12\\%", "\\frac12"),
    ("72^\\circ \\text{C}", "72^\\circ \\text{F}"), ("72 degrees Celsius", "72 °F"), ("72°C", "27"),
    ("3 hours and 20 minutes", "3 \\text{ hours } 30 \\text{ minutes}"), ("3 hours 20 minutes", "3.2"),
    ("12 dollars and 5 cents", "12.50"), ("3 hours and 20 miles", "3"), ("5 feet 6 inches", "5 \\text{ feet}"),
)
PRODUCTS = (
    ("3", "3xy"), ("3xy", "3"), ("2", "2s"), ("3", "3m^2"), ("5", "5ab"), ("4", "4gh"), ("2\\pi", "2\\pi rh"),
)
EXPRESSIONS = (
    ("x+1 \\text{ is false}", "x+1"), ("2\\sqrt{3} \\text{ million}", "2\\sqrt{3}"), ("not $x+1$", "x+1"),
    ("x+1 or x+2", "x+1"), ("2", "2, 3"), ("\\sqrt{12}=3\\sqrt{2}", "3\\sqrt{2}"), ("x=4=5", "x=5"),
    ("5\\sqrt{2} \\approx 9", "5\\sqrt{2}"), ("0.3", "0.\\overline{3}"), ("0.333", "\\frac13"),
    ("0.(36)", "0.36"), ("x \\ne 3", "(-\\infty,2)\\cup(2,\\infty)"), ("(-7)/12", "7/12"),
    ("(3,-\\infty)", "(3,\\infty)"), ("x>5 \\text{ and } x<3", "(3,5)"), ("x>3 \\text{ or } x<5", "(3,5)"),
    ("x>3 \\text{ and } y<5", "(3,5)"), ("x>3 \\text{ and } x<5", "[3,5]"), ("9 \\approx 5\\sqrt2", "5\\sqrt2"),
    ("0.6 \\approx 2/3", "2/3"), ("5 \\text{ to } 3", "3:5"), ("5 \\text{ to } 3", "5"), ("2(2)", "2"),
    ("a third of 42", "\\frac13"),
    ("\\text{all real numbers except }2", "(-\\infty,\\infty)"), ("0", "\\text{no solution}"),
    ("\\text{June 12th}", "\\text{June 20}"),
    ("x", "\\sqrt{x^2}"), ("even, odd", "even"), ("\"not even\"", "even"),
    ("x=3, y=-4", "(-4,3)"), ("x=3, x=-4", "(3,-4)"), ("x=3, y=-4, z=1", "(3,-4)"),
    ("x=3 or y=-4", "(3,-4)"), ("Q(3,4)", "(4,3)"),
    ("]1,5]", "(1,5)"), ("]1,5[", "[1,5]"), ("(1,2]\\cup(3,4]", "(1,2)\\cup(3,4]"),
    ("5>x\\ge2", "(2,5)"), ("5>x>2", "2<y<5"), ("5>x>2", "2 \\le x<5"),
    ("10^{5}", "1000000"), ("-10^{5}", "100000"), ("10^{-5}", "100000"), ("x+y=5", "6"), ("x+y=6=5", "5"),
    ("5", "x+y=5"), ("2x=10", "10"), ("x+5=10", "10"), ("xy-1=5", "5"), ("[ABC]=12, [DEF]=13", "12"),
    ("12=3 \\cdot 5", "12"), ("13=3 \\cdot 4", "12"), ("{3 \\over 4}", "\\frac43"), ("4 \\div 3", "\\frac34"),
    ("1101 \\text{ (base 3)}", "1101_2"), ("2b_{16}", "2A_{16}"), ("1101 base 2", "1101"),
    ("\\text{not an ellipse}", "\\text{ellipse}"), ("\\text{an ellipse or a circle}", "\\text{ellipse}"),
    ("(B) or (C)", "\\text{(B)}"), ("(C)~12", "\\text{(B)}"), ("\\text{not (B)}", "\\text{(B)}"),
)
CHOICES = (  # response, gold
    ("The answer is A or B.", "A"), ("The answer is (A) or (B).", "A"), ("Answer: A/B", "A"),
    ("\\boxed{A, B}", "A"), ("The answer is A, B, C, D, E.", "A"), ("The answer is A is wrong.", "A"),
    ("The answer is (A) is not it.", "A"), ("\\boxed{A} or \\boxed{B}", "B"), ("The answer is not B.", "B"),
    ("The answer is a number.", "A"), ("It is (A) or (B).", "A"),
    ("The answer is A B.", "A"), ("The answer is A (or B).", "A"), ("The answer is (A)(B).", "A"),
    ("The answer is A|B.", "A"),
    ("The answer is A? No, B.", "A"), ("The answer is A, no, B.", "A"), ("The answer is A... or maybe B.", "A"),
    ("The answer is A (B is also possible).", "A"), ("The answer is A, but B could be too.", "A"),
    ("Answer: A+", "A"),
    ("Answer: A2", "A"), ("\\boxed{A \\text{ or } B}", "A"), ("Option A is wrong.", "A"), ("(A) is false.", "A"),
    ("The answer must be A or B.", "A"), ("The answer should be between A and B.", "A"),
    ("<answer>A⏎B</answer>", "A"),
)

HONEST = r"""
G|G.|$G|\$G|G dollars|$G$|G.0|+G|**G**|G eggs|G apples left over|Ann has G eggs|a total of G|G eggs in all
G per day|G hours per week|only G|exactly G|so G|G more|G fewer eggs|G km/h|G miles per hour|G%|x = G|x=G
N + G - N = G|the total is G|G dollars every day|He has G pens left|(G)|G\text{ eggs}|G \text{ square units}
G = G
"""
HONEST_PAIRS = (
    ("twelve", "12"), ("forty-two", "42"), ("two hundred and five", "205"), ("2 million", "2000000"),
    ("1.5 million", "1500000"), ("a dozen eggs", "12"), ("half a dozen", "6"), ("3 dozen", "36"),
    ("negative 7", "-7"), ("minus seven", "-7"), ("two and a half", "2.5"), ("42 and a half", "42.5"),
    ("1 000 dollars", "1000"), ("1\u2009000\u2009000", "1000000"), ("12 thousand dollars", "12000"),
    ("20 apples + 22 apples = 42 apples", "42"), ("2 x 3 = 6", "6"), ("100/3 = 33.33", "33.33"),
    ("1.2e3", "1200"), ("42 (forty-two)", "42"), ("forty-two (42) eggs", "42"), ("`42`", "42"),
    ("12 dollars and 50 cents", "12.50"), ("72°C", "72"), ("-40 degrees Fahrenheit", "-40"), ("42 ✅", "42"),
    ("42 ✓", "42"), ("🎉 42 🎉", "42"), ("42 = 6 * 7", "42"),
    ("_42_", "42"), ("Total: 42", "42"), ("Total cost: $42", "42"), ("Profit: -42", "-42"), ("42 logs", "42"),
    ("42 cots", "42"),
    ("The cost is 42", "42"), ("two thirds", "2/3"), ("one half", "0.5"), ("three-fourths", "0.75"),
    ("seven tenths", "7/10"),
    ("5E-3", "0.005"), ("1.2 \\times 10^3", "1200"), ("1e+22", "1" + "0" * 22), ("−5", "-5"),
    ("１８", "18"),
)
HONEST_MATH = (
    ("x=3, y=-4", "(3,-4)"), ("y=-4 \\text{ and } x=3", "(3,-4)"), ("x=3,\\ y=-4", "(x,y)=(3,-4)"),
    ("(3,-4)", "x=3, y=-4"), ("a=2, b=3, c=5", "(2,3,5)"), ("x=1{,}000; y=2", "(1000,2)"),
    ("P(3,-4)", "(3,-4)"), ("P = (3,-4)", "(3,-4)"),
    ("]1,5[", "(1,5)"), ("[1,5[", "[1,5)"), ("]-\\infty,1]\\cup]2,3]", "(-\\infty,1]\\cup(2,3]"),
    ("5>x\\ge2", "2\\le x<5"), ("2<x<5", "5>x>2"), ("10^{5}", "100000"), ("1.0 \\times 10^{12}", "10^{12}"),
    ("10^{-2}", "0.01"), ("x+y=5", "5"), ("x^2+y^2=5", "5"), ("\\frac{a}{b}=\\frac12", "0.5"), ("[ABC]=12", "12"),
    ("f^{-1}(2)=7", "7"), ("{3 \\over 4}", "\\frac34"), ("{\\sqrt{3} \\over 2}", "\\frac{\\sqrt3}2"),
    ("3 \\over 4", "\\frac34"), ("3 \\div 4", "\\frac34"), ("2a_{16}", "2A_{16}"), ("1101_{base\\ 2}", "1101_2"),
    ("1101 \\text{ (base 2)}", "1101_2"), ("3\\text{ hours and }20\\text{ minutes}", "3\\text{ hours }20\\text{ min}"),
    ("5 \\text{ ft } 6 \\text{ in}", "5 \\text{ feet, } 6 \\text{ inches}"), ("72^\\circ\\text{C}", "72"),
    ("72^\\circ C", "72^\\circ"), ("\\text{an ellipse}", "\\text{ellipse}"), ("ellipse", "\\text{An ellipse}"),
    ("\\textbf{(B)}\\ 12", "\\text{(B)}"), ("B", "\\text{(B)}"), ("\\text{(B) is correct}", "\\text{(B)}"),
    ("\\text{all real numbers}", "(-\\infty,\\infty)"), ("\\mathbb{R}", "\\text{all real numbers}"),
    ("\\text{no solution}", "\\emptyset"), ("\\emptyset", "\\text{No real solutions}"),
    ("x>3 \\text{ and } x<5", "(3,5)"), ("3 \\le x \\text{ and } x<5", "[3,5)"), ("5 \\text{ to } 3", "5:3"),
    ("1.414 \\approx \\sqrt{2}", "\\sqrt2"), ("0.67 \\approx \\frac23", "\\frac23"),
    ("\\text{June 20th}", "\\text{June 20}"),
    ("cos x", "\\cos x"), ("cosx", "\\cos x"), ("sin t", "\\sin t"),
    ("5 m", "5 meters"), ("5m", "5 meters"), ("25 \\text{ cm squared}", "25 \\text{ cm}^2"),
    ("25 cm²", "25 \\text{ square cm}"), ("60 \\frac{\\text{km}}{\\text{h}}", "60 \\text{ km/h}"),
    ("9.8 \\text{ m/s}^2", "9.8"), ("60 \\text{ miles per hour}", "60 \\text{ mph}"),
    ("5 \\text{ dollars}", "\\$5"), ("5", "\\$5"), ("$5", "5 \\text{ dollars}"), ("50¢", "50 \\text{ cents}"),
    ("x=2+3=5", "x=5"), ("\\frac12=0.5", "\\frac12"), ("\\sqrt{12}=2\\sqrt3", "2\\sqrt3"),
    ("\\frac23 ≈ 0.667", "\\frac23"), ("0.333...", "\\frac13"), ("0.1\\overline{6}", "\\frac16"),
    ("0.\\dot{1}4285\\dot{7}", "1/7"), ("1/7", "0.(142857)"), ("0.\\bar{3}", "0.\\overline{3}"),
    ("33.\\overline{3}\\%", "\\frac{100}{3}\\%"), ("0.1666\\ldots", "1/6"), ("0.3̅", "1/3"), ("x⁴+1", "x^4+1"),
    ("52₈", "52_8"), ("√12", "2\\sqrt3"), ("2½", "\\frac52"), ("x⁻¹", "\\frac1x"), ("π/2", "\\frac{\\pi}2"),
    ("³⁄₄", "\\frac34"), ("x ⩽ 4", "x \\le 4"), ("α+1", "\\alpha+1"), ("𝑥+1", "x+1"), ("x₁+1", "x_1+1"),
    ("sin(x)", "\\sin x"), ("ln 2", "\\ln(2)"), ("exp(-1)", "e^{-1}"),
    ("sqrt((x+1)/2)", "\\sqrt{\\frac{x+1}{2}}"), ("2 cos x", "2\\cos x"), ("(-7)/12", "-\\frac7{12}"),
    ("-(7)/(12)", "-\\frac7{12}"), ("\\frac{(-7)}{12}", "-\\frac7{12}"), ("(-7)", "-7"),
    ("(3,+\\infty)", "(3,\\infty)"), ("x \\neq 2", "(-\\infty,2)\\cup(2,\\infty)"),
    ("\\mathbb{R}\\setminus\\{2\\}", "(-\\infty,2)\\cup(2,\\infty)"),
    ("x \\ne \\pm 2", "(-\\infty,-2)\\cup(-2,2)\\cup(2,\\infty)"),
    ("x<1 \\text{ or } x>3", "(-\\infty,1)\\cup(3,\\infty)"), ("\\{x \\mid 2 \\le x < 5\\}", "[2,5)"),
    ("\\{x : x > 3\\}", "(3,\\infty)"), ("\\{\\}", "\\emptyset"), ("∅", "\\emptyset"),
    ("\"even\"", "\\text{even}"), ("'even'", "\\text{even}"), ("``even''", "\\text{even}"),
    ("\\begin{pmatrix} 1 \\\\[4pt] 2 \\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
    ("\\begin{pmatrix} 1 \\\\*[-0.3 em] 2 \\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
    ("111111111", "111, \\! 111, \\! 111"), ("1{,}000", "1000"), ("1\\;000", "1000"), ("12 345.67", "12345.67"),
    ("10\\,000", "10000"), ("\\text{The probability is } \\frac34", "\\frac34"),
    ("\\frac34 or 0.75", "\\frac34"),
    ("\\frac{639}{40}", "15\\frac{39}{40}, \\frac{639}{40}"),
    ("\\sqrt{1/n}", "\\frac{1}{\\sqrt n}"), ("\\frac{ 1 }{ 2 }", "\\frac12"),
    ("2 + 2 \\sqrt{3}", "2+2\\sqrt3"), ("\\frac{639}{40}", "15 \\frac{39}{40}"),
)
HONEST_RESPONSES = r"""
GSM8K|#### G
GSM8K|####⏎G
GSM8K|#### Final Answer⏎G
GSM8K|#### Answer: G
GSM8K|## Final Answer⏎G
GSM8K|**Final Answer**⏎⏎G dollars
GSM8K|**Answer:** G
GSM8K|\textbf{Answer: } G
GSM8K|\textbf{Answer: G}
GSM8K|The answer is:⏎$$G$$
GSM8K|### Solution⏎#### Part 1⏎N eggs⏎#### Part 2⏎N+1⏎⏎So the answer is G.
GSM8K|#### Step 1: Eggs⏎N⏎⏎#### Step 2: Earnings⏎G⏎⏎The answer is \boxed{G}.
GSM8K|#### Cost of N apples⏎N*2⏎⏎#### Total⏎The answer is G.
GSM8K|#### 1. Count⏎N⏎#### 2. Add⏎G⏎**Answer: G**
GSM8K|<think>N or G? \boxed{N}</think>⏎<answer>G</answer>
GSM8K|<think>N</think>The answer is G.
GSM8K|N, I think.</think>⏎\boxed{G}
GSM8K|<answer>\boxed{G}</answer>
GSM8K|<answer>The answer is G.</answer>
GSM8K|<answer>⏎G⏎</answer>
GSM8K|Let me restate it.⏎**Problem:** how many dollars?⏎She sells N eggs.⏎#### G
GSM8K|Question: how many?⏎She sells N and N.⏎The answer is G.
GSM8K|The answer is G.⏎⏎Question: and now?⏎The answer is N.
GSM8K|She sells N eggs for G dollars.
GSM8K|N eggs are sold.⏎#### Total⏎G
GSM8K|N eggs are sold.⏎#### Step 3: Total⏎**G**
GSM8K|<answer>She sells N eggs. So she gets G dollars</answer>
GSM8K|<answer>⏎She sells N eggs.⏎The answer is G.⏎</answer>
MATH|<answer>We see N. Therefore $x=G$</answer>
MATH|<answer>⏎$$⏎G⏎$$⏎</answer>
GSM8K|Question 1: how many?⏎The answer is N.⏎Question 2: what do they cost?⏎The answer is G.
GSM8K|It is not N, the answer is G.
GSM8K|There is no doubt that the answer is G.
GSM8K|If I am not wrong the answer is G.
GSM8K|\boxed{N} + \boxed{1} = \boxed{G}
MATH|Ann has \boxed{N} or so. In total \boxed{G}.
MATH|Adults: \boxed{N}.⏎Total: \boxed{G}.
MATH|It is \boxed{G} (or, in full, \boxed{G.0}).
MATH|Thus the sum is that.⏎#### G
MATH|#### Step 1: sum⏎N⏎#### Step 2⏎so $\boxed{G}$
MATH|<think>\boxed{N}</think> The answer is $G$.
MATH|First \boxed{N}, so that the sum is \boxed{G}.
MATH|$$\boxed{G}$$⏎⏎$\boxed{G}$
MATH|It is \boxed{G}, or \boxed{G.0}.
MATH|**Final Answer**⏎⏎$G$
MATH|The answer is $G$ dollars.
GSM8K|The answer is G.</s>
GSM8K|The answer is G.<|eot_id|><|start_header_id|>user<|end_header_id|>⏎The answer is N.
GSM8K|She sells N eggs for G dollars.<|endoftext|>
GSM8K|#### G<end_of_turn>
GSM8K|#### G<｜end▁of▁sentence｜>
MATH|Therefore $\boxed{G}$.<|im_end|>⏎$\boxed{N}$
"""
HONEST_CHOICES = (
    ("\\boxed{b}", "B"), ("The answer is Option B", "B"), ("The answer is (b).", "B"), ("**Answer: B**", "B"),
    ("Answer: b", "B"), ("The answer is b) 21.", "B"), ("The correct answer is choice (B).", "B"),
    ("\\boxed{\\text{(b)}}", "B"), ("(b)", "B"),
    ("$\\textbf{(B)}\\ 12$ is it. The answer is $\\textbf{(B)}\\ 12$.", "B"),
    ("The answer is B because A is too small.", "B"), ("The answer is the letter B.", "B"), ("#### B", "B"),
    ("<answer>b</answer>", "B"), ("Answer: A and C", "AC"),
    ("The correct option is B.", "B"), ("Option B is correct.", "B"), ("B is the answer.", "B"),
    ("The answer must be B.", "B"),
    ("The answer is clearly B.", "B"), ("The answer is therefore (B).", "B"), ('The answer is "B".', "B"),
    ("The answer is 'B'.", "B"),
    ("The answer is “B”.", "B"), ("The answer is `B`.", "B"), ("The answer is [B].", "B"),
    ("The answer is B, not A.", "B"),
    ("The answer is B, C is too small.", "B"), ("The answer is B because C can be ruled out.", "B"),
    ("The answer is B) F = ma", "B"),
    ("The answer is B) A circle", "B"), ("The answer is (B) I and II", "B"),
    ("The answer must be positive. So (B).", "B"),
    ("Answer: B</s>", "B"), ("The answer is B<|im_end|>", "B"), ("B<|eot_id|>", "B"),
    ("<answer>B. Twelve eggs</answer>", "B"), ("The answer is B = 12.", "B"),
)

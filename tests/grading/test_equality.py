"""src/grading/equality.py: for each kind of answer other ways to write it, and near misses of it."""

from collections.abc import Iterator

import pytest

from src.grading.grader import Grader

KINDS = r"""
# thousands
= 10,\!080
+ 10,080 ;; 10{,}080 ;; 10\, 080 ;; 10 080
- 10, 80 ;; 10,\!08 ;; 100,80 ;; 10.080
= \$115,000
+ 115{,}000 ;; 115 thousand
- 115,00 ;; 115, 0 ;; 115
= 100,200
+ 100, 200 ;; 200, 100
- 100 ;; 100, 20
# styles
= \frac{3}{4}
+ \mathbf{\frac{3}{4}} ;; \boldsymbol{\frac34} ;; {\bf \frac34} ;; \underline{\frac{3}{4}}
- \mathbf{\frac{4}{3}}
= \frac{3}{4}
+ \color{red}{\frac34} ;; \frac34 \checkmark ;; \frac34\quad\blacksquare ;; \frac{3}{4} = 75\%
- \frac34 = 70\%
= 5
+ \bf 5 ;; \ 5\ ;; \underline{\underline{5}} ;; 5\text{ (five)} ;; 5^{\text{th}}
- 5^{t} ;; 5\text{ (six)}
= 15
+ \15 ;; \$15
- \\15 ;; 1 \\ 5
= 440\text{ cm}^2
+ 440\text{ cm²} ;; 440\text{ cm$^2$} ;; 440\textnormal{ cm}^2
- 440\text{ cm³}
# degrees
= 45^\circ
+ {45^\circ} ;; 45\text{°} ;; 45^{o} ;; 45^\text{o} ;; 45{}^\circ ;; \angle{B} = 45^\circ
- 45^{5} ;; 54^{o}
= \frac{90^\circ}{x}
+ \frac{90^{\circ}}{x}
- \frac{90^\circ}{y}
= \cos 58^\circ
+ \cos{58^\circ} ;; \sin 32^\circ ;; \cos 58
- \sin 58^\circ ;; \cos 32^\circ ;; 0.53
= \frac{\sqrt{6}+\sqrt{2}}{4}
+ \frac{\sqrt2+\sqrt6}{4} ;; \frac{1+\sqrt3}{2\sqrt2}
- \sin 75^\circ ;; \cos\frac{\pi}{12} ;; \frac{\sqrt6-\sqrt2}{4}
= \frac{\pi}{3}
+ 60^\circ ;; \pi/3
- \arctan\sqrt3 ;; \arccos\frac12
= 2\sin b\cos a
+ 2\cdot\sin b\cdot\cos a ;; 2 \cos(a)\sin(b)
- 2\sin a\cdot\cos b
= \cot x
+ \cos x / \sin x ;; \frac{1}{\tan x}
- \sin x / \cos x ;; \tan x
= \arctan 2
+ \operatorname{arctan} 2 ;; \mathrm{arctan}\,2 ;; \tan^{-1} 2
- \arctan \frac12 ;; \tan 2
= \sqrt[3]{2}
+ \sqrt[3]2 ;; 2^\frac{1}{3} ;; 2^{1/3}
- \sqrt2 ;; 2^\frac{1}{2} ;; \sqrt[3]4
# percent and rounded
= 0
+ 0\% ;; 0.0\%
- 1\%
= 5
+ 10% * 50 = 5 ;; 10\% \text{ of } 50 = 5 \text{ eggs} ;; 0.1 \times 50 = 5
- 10% * 60 = 5 ;; 10 * 50 = 5 ;; 10\%
= 25\%
+ \frac14 = 25\% ;; 1/4 = 25% ;; 5/20 = 0.25 = 25\%
- 1/5 = 25% ;; \frac14 = 75\%
= 0.56 = 56\%
+ 0.56 ;; 56\%
- 0.65 ;; 5.6\%
= \approx 8.24 \text{ mph}
+ 8.24 ;; \approx 8.24 \text{ mph}
- 8.2 ;; 8.24 \text{ km/h}
= 3
+ 3.0
- \approx 3 ;; \approx 3.1
# names
= 12
+ a\cdot b = 12 ;; m+n = 5+7 = 12 ;; \binom{12}{1} = 12
- m+n = 5+8 = 12 ;; 2a = 12 ;; \binom{12}{2} = 12 ;; \binom{12}{1}
= \frac{x+2}{7}
+ f^{-1}(x) = \frac{x+2}{7}
- f^{-1}(x) = \frac{x-2}{7}
= \begin{pmatrix} 1 \\ 4 \end{pmatrix}
+ \vec{v} = \begin{pmatrix} 1 \\ 4 \end{pmatrix}
- \vec{v} = \begin{pmatrix} 4 \\ 1 \end{pmatrix}
= \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}
+ \left(\begin{array}{c c} 1 & 2 \\ 3 & 4 \end{array}\right) ;; \begin{pmatrix*}[r] 1 & 2 \\ 3 & 4 \end{pmatrix*}
- \left(\begin{array}{c c} 1 & 3 \\ 2 & 4 \end{array}\right) ;; \begin{vmatrix*}[r] 1 & 2 \\ 3 & 4 \end{vmatrix*}
= 7
+ \text{The answer is: }7 ;; \text{There are 7 values}
- \text{divisible by 7} ;; \text{The answer is not: }7
# ratios and times
= 3:4
+ 3 : 4 ;; 3\colon4 ;; 3\text{ to }4 ;; 6:8 ;; 1.5:2 ;; \frac34 ;; 3/4
- 4:3 ;; 6:9 ;; 0:0 ;; \frac43 ;; 3
= 2:3:5
+ 4:6:10
- 4:6 ;; 2:3:6 ;; 3:2:5
= 9:24
+ 9{:}24
- 3:8 ;; 18:48 ;; \frac{9}{24}
= \text{4:30 p.m.}
+ 4:30 PM ;; 04:30 PM ;; 4{:}30\text{ pm}
- 4:30 AM ;; 5:30 PM ;; 4:03 PM
= 9\text{ a.m.}
+ 9:00 AM ;; 9 AM
- 9:30 AM ;; 9 PM
= 0.0011_2
+ .0011_2
- 0.011_2 ;; 0.0011_3 ;; 0.0011
# text
= \text{even}
+ \text{The function is even} ;; \text{It is even.}
- \text{It is not even} ;; \text{It is even or odd} ;; \text{It is uneven}
= \text{DNE}
+ \text{Does not exist} ;; \text{The limit does not exist} ;; doesn't exist ;; D.N.E.
- 0 ;; \infty ;; \text{exists}
= \text{does not exist}
+ DNE ;; \text{does not exist.}
- 0 ;; \text{undefined}
= \text{undefined}
+ \text{not defined}
- 0 ;; \text{defined}
= \text{A,C,F}
+ (A), (C), (F) ;; \text{(A), (C), and (F)} ;; \{A,C,F\} ;; F, C, A
- A, C ;; (A), (B), (C), (F)
# equations
= 4x-5y=-50
+ y=\frac45x+10 ;; 5y-4x=50 ;; x = \frac{5y-50}{4}
- 8x-10y=-100 ;; y=\frac54x+10 ;; y=\frac45x-10
= y = 3x-1
+ y-2=3(x-1) ;; 3x-y-1=0
- 2y=6x-2 ;; 6x-2y-2=0
= (x-3)^2+(y+2)^2=25
+ x^2-6x+y^2+4y-12=0
- 2x^2-12x+2y^2+8y-24=0 ;; x^2-6x+y^2+4y-12
# binomial coefficients
= \frac{n(n-1)}{2}
+ \binom{n}{2} ;; \binom n2 ;; {n \choose 2} ;; \dbinom{n}{2}
- \binom{n+1}{2} ;; \binom{n}{3} ;; \binom{2}{n}
= \binom{n+1}{2}
+ \frac{n^2+n}{2}
- \frac{n^2-n}{2}
# sets of reals
= (-3,3)
+ |x|<3 ;; \left|x\right|<3 ;; 3>|x| ;; \{x : |x|<3\}
- |x|\le3 ;; |x|>3 ;; |x-1|<3 ;; |x|<-3 ;; |x|=3
= -3<x<3
+ |x|<3 ;; (-3,3)
- |y|<3 ;; |x|\le3
= [1,9]
+ |x-5|\le4 ;; x\ge1, x\le9
- |x+5|\le4 ;; |x-5|\ge4 ;; |x-5|<4
= (-\infty,1)\cup(3,\infty)
+ |x-2|>1 ;; x<1, x>3 ;; (3,\infty), (-\infty,1) ;; x\in(-\infty,1) \text{ or } x\in(3,\infty)
- x>1, x<3 ;; |x-2|\ge1 ;; (-\infty,1)
= (-\infty,1)\cup(3,\infty)
+ (-\infty,1)\bigcup(3,\infty) ;; (-\infty,1) U (3,\infty)
- (-\infty,1)\cap(3,\infty) ;; y<1, x>3
= [2,5)
+ x\ge2, x<5 ;; x<5 \text{ and } x\ge2
- x\ge2 ;; x\ge2, y<5 ;; x>2, x<5
= [2,3)\cup(3,\infty)
+ x\ge2, x\ne3 ;; x \ge 2 \text{ and } x \ne 3
- x>2, x\ne3 ;; x\ge2, x\ne4 ;; x\ge2, y\ne3
= (-\infty,5)\cup(5,\infty)
+ \text{all real numbers except } 5 ;; \text{All reals except }x=5 ;; \mathbb{R}-\{5\}
- \text{all real numbers except } 6
= [6,\infty)
+ [6, inf) ;; [6, oo) ;; 6\le x<+\infty
- (6,inf) ;; [6,-inf)
= \emptyset
+ \text{There are no solutions} ;; \text{the empty set}
- \text{There are two solutions} ;; 0
= x\ge6
+ 6\le x ;; [6,\infty)
- y\ge6 ;; (6,\infty) ;; x\ge5
# letters that are units elsewhere
= \frac{h^2}{m}
+ h^2/m ;; h**2/m ;; h^{2} / m
- m/h^2 ;; h^2m ;; h^2
= 2s
+ 2 s ;; s+s
- 2 ;; 2 m
= 2 \sin 5x \cos x
+ 2 \cdot \sin{\left(5 x \right)} \cdot \cos{\left(x \right)} ;; 2\sin{5x}\cdot\cos{x}
- 2 \cdot \sin{\left(x \right)} \cdot \cos{\left(5x \right)} ;; 2\sin{(5x\cos x)}
# plus or minus
= \pm 4
+ +/-4 ;; 4 \text{ and } -4
- 4 ;; +/-2
"""


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader("MATH") as grader:
        yield grader


def pairs() -> list[tuple[str, str, str]]:
    """(answer, label, outcome): below "= LABEL" behind + what says the same, behind - what does not."""
    found, label = [], ""
    for line in KINDS.strip().splitlines():
        sign, rest = line[0], line[2:]
        label = rest if sign == "=" else label
        if sign in "+-":
            found += [(answer, label, "right" if sign == "+" else "wrong") for answer in rest.split(" ;; ")]
    return found


@pytest.mark.parametrize(("answer", "label", "outcome"), pairs())
def test_kinds_of_answers(grader: Grader, answer: str, label: str, outcome: str) -> None:
    assert grader.compare(answer, label) == outcome
